"""What a run leaves behind: folder, progress, statistics, report, evaluation, export."""
