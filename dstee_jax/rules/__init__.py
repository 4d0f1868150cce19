"""What a method is made of: scores, plans, schedule, memory, penalties, structures."""
