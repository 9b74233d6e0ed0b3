"""What tests of products in fp8 share."""
