"""What the engine is compared with, each written as well as its approach allows."""
