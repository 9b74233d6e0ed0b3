"""How losses fall: with each saving, on products in fp8."""
