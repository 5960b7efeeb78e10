"""`rookery sweep`: many runs of a recipe, chosen, started, judged and resumed by Ray Tune.

Of its modules `driver`, `schedulers`, `search` and `trial` need Ray; `cluster` imports it when it is asked to.
"""
