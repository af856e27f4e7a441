"""Commands that neither train nor compare: check, predict, rank teachers, benchmark, demo."""
