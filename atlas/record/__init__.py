"""What a run leaves behind: the journal of its metrics, reports, and the record in MLflow."""
