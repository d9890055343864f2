"""The tests of leap_dist; folders mirror the package."""
