raise SystemExit("not on this machine")
