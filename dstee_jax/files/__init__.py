"""What is kept after training: small files of sparse networks, and other people's formats."""
