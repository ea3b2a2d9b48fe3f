"""Publishing a checkpoint or an adapter on the Hugging Face Hub."""
