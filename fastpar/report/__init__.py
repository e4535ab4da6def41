"""What a report says, in words and tables for the terminal and for a page that can be sent around."""
