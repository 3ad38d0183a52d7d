"""Drafter training: online distillation of an EAGLE drafter from the model that it drafts for, which does not change."""
