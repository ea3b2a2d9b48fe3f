"""The parts of the pass over the layers: steps, survey, budgets, cost, report."""
