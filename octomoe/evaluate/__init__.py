"""What quantisation costs: metrics, comparison with the unquantised model, report, plots."""
