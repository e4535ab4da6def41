"""The command line: ``fastpar VERB MODEL``. One file per verb; torch is imported only once a verb runs."""
