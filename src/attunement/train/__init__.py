"""Training from Python (`Trainer`, `Callback`) and from recipe files (`attune train`)."""
