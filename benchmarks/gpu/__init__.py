"""``make gpu``: what can be measured on one GPU. ``suite.py`` runs the parts, each of which is a file here."""
