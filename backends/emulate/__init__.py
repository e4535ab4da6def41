"""``emulate``: one device plays rank r of N; exchanges take the time that their bytes need on given links."""
