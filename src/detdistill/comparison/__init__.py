"""Arms with equal budgets over several seeds: the study, its runs, and the paired result."""
