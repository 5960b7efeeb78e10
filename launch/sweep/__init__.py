"""`rookery sweep`: many runs of a recipe, chosen, started, judged and resumed by Ray Tune.

Only `cluster`, `trial`, `driver`, `schedulers` and `search` know Ray; importing the others costs nothing.
"""
