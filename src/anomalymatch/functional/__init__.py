"""The mathematics: pure functions on tensors and arrays. No configuration, no Lightning, no logging."""
