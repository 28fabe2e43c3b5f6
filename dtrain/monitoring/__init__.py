"""Record what a run does: metrics, plots, the HTML report and the terminal summary."""
