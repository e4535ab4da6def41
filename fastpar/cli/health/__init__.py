"""What ``fastpar doctor`` looks at. Nothing here imports torch before a check needs it: it may be what is broken."""
