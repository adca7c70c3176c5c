"""Numbers only: storage bytes, budgets, problems, solvers, strategies, plans. Never imports torch."""
