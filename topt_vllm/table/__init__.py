"""The threshold table: the contract between the calibrator, which writes one per model, and whatever reads it."""
