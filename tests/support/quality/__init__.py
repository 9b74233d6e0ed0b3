"""What tests of the study share."""
