"""The passes, one file each, named as their pass (``attention-ulysses`` is ``attention_ulysses.py``)."""
