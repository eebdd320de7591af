"""What people read: pages, tables, model cards. Nothing but commands imports this."""
