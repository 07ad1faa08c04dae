"""What runs several trainings, or looks at several runs."""
