"""What methods of fine-tuning put into models, one file per method."""
