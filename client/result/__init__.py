"""What a member has after a run: its model, loaded, compared, handed on. Nothing here is sent."""
