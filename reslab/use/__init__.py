"""Using what a training made: predicting and scoring."""
