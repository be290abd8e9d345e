"""The lab on a real model."""
