"""What a job will take, before it is paid for: memory, FLOPs, traffic, seconds."""
