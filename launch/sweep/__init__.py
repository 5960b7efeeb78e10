"""`rookery sweep`: many runs of a recipe, chosen, started, judged and resumed by Ray Tune.

Of its modules `cluster`, `driver`, `schedulers`, `search` and `trial` know Ray, and only `cluster` may be imported
without it.
"""
