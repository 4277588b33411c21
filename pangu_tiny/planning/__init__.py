"""What programs will cost on TPUs, found out without one."""
