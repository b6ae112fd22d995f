"""What a run leaves behind: log, plots, report and model card; knows neither torch nor models."""
