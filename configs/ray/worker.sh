#!/usr/bin/env bash
# Starts Ray on a worker. `ray down` ends the head alone: a minute later the worker's raylet gives up, and here the rest of
# Ray on this machine ends with it, which would stay otherwise. Of several clusters only this one's processes are met.
set -euo pipefail
# shellcheck disable=SC2016
exec setsid --wait bash -c '
  ulimit -n "$(ulimit -Hn)"
  ray start --address="$RAY_HEAD_IP:6379"
  raylet=$(pgrep --session 0 --exact raylet)
  (tail --pid="$raylet" -f /dev/null; sleep 5; pkill -KILL --session 0) </dev/null >/dev/null 2>&1 &
'
