"""The workers as the launcher sees them: processes, streams, questions, coming and going."""
