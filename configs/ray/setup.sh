#!/usr/bin/env bash
# Makes a node of a Ray cluster ready for Rookery. `ray up` calls it on the head, the head on every worker.
#   ROOKERY_SHARED       folder that every node sees: runs and shards are there (docs/clusters.md)
#   ROOKERY_NFS          what to mount there unless something is: an NFS server's HOST:/SHARE
#   ROOKERY_NFS_OPTIONS  of that mount
#   ROOKERY_ENV          a Python environment that has all packages already; without it one is made in ~/rookery-env
#   ROOKERY_PACKAGES     more packages for the environment that is made
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
  echo "setup.sh on $(hostname): $1" >&2
  exit 1
}

# --- shared storage: recipes say runs/ and shards/, on every node the same folders
[ -n "${ROOKERY_SHARED:-}" ] || fail "ROOKERY_SHARED is not set; name a folder that every node sees"
if [ -n "${ROOKERY_NFS:-}" ] && ! mountpoint -q "$ROOKERY_SHARED"; then
  command -v mount.nfs >/dev/null || {
    wait="-o DPkg::Lock::Timeout=600" # a machine that has just started updates itself
    # shellcheck disable=SC2086
    sudo apt-get $wait -qq update && sudo apt-get $wait -qq -y install nfs-common
  }
  sudo mkdir -p "$ROOKERY_SHARED"
  sudo mount -t nfs -o "${ROOKERY_NFS_OPTIONS:-hard}" "$ROOKERY_NFS" "$ROOKERY_SHARED"
  sudo chown "$(id -u):$(id -g)" "$ROOKERY_SHARED"
fi
mkdir -p "$ROOKERY_SHARED/runs" "$ROOKERY_SHARED/shards" || fail "can't write to $ROOKERY_SHARED; is it mounted?"
for folder in runs shards; do
  ln -sfn "$ROOKERY_SHARED/$folder" "$checkout/$folder"
done

# --- environment
build() {
  local wanted
  wanted=$(cd "$checkout" && cat pyproject.toml constraints.txt configs/ray/setup.sh - <<<"${ROOKERY_PACKAGES:-}" | sha256sum)
  [ "$(cat "$env/.ready" 2>/dev/null)" != "$wanted" ] || return 0
  if ! command -v uv >/dev/null; then
    curl -LsSf https://astral.sh/uv/install.sh | env UV_UNMANAGED_INSTALL="$HOME/.local/bin" sh
  fi
  [ -x "$env/bin/python" ] || uv venv --python 3.11 "$env"
  echo "installing packages (about 7 GB the first time) ..."
  # shellcheck disable=SC2086
  uv pip install --quiet --compile-bytecode --python "$env/bin/python" --constraint "$checkout/constraints.txt" \
    --editable "${checkout}[ray,deepspeed,s3,nlp,generate]" ${ROOKERY_PACKAGES:-}
  echo "$wanted" >"$env/.ready"
}
if [ -n "${ROOKERY_ENV:-}" ]; then
  env=$ROOKERY_ENV
  [ -x "$env/bin/ray" ] || fail "ROOKERY_ENV=$env has no bin/ray"
else
  env=$HOME/rookery-env
  export PATH="$HOME/.local/bin:$PATH"
  # Nodes that share their home folder come here at the same time.
  (flock 9; build) 9>"$env.lock"
fi

# --- what shells, Ray and its jobs find
cat >"$HOME/.rookery.sh" <<END
export PATH="$env/bin:\$PATH" PYTHONPATH="$checkout" RAY_AUTH_MODE=token ROOKERY_SHARED="$ROOKERY_SHARED"
export RAY_worker_niceness=0  # else 15: trials would get only the cores that nothing else wants
END
grep -qsF '. ~/.rookery.sh' "$HOME/.bashrc" || echo '. ~/.rookery.sh' >>"$HOME/.bashrc"
[ -s "$HOME/.ray/auth_token" ] || fail "no token in ~/.ray/auth_token; run \`ray get-auth-token --generate\` where you run \`ray up\`"
chmod 600 "$HOME/.ray/auth_token"
