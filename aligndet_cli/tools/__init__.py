"""Commands around the stages: what they use, no stage depends on."""
