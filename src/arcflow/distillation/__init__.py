"""What the methods share: policies, the teacher's walk, objectives, and what a method is."""
