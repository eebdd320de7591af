"""Laws and stories, room by room."""
