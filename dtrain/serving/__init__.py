"""After training: adapters listed, a server's commands written, models and adapters talked to."""
