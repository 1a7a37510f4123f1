"""What acts: the policies that a trainer can teach."""
