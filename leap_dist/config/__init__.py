"""What a job may say, read and checked."""
