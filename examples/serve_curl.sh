#!/bin/sh
# Asks a running server with curl:  logo serve --base-model demo  and then  sh examples/serve_curl.sh
# URL and key may be given:  LOGO_URL=http://127.0.0.1:8000 LOGO_API_KEY=... sh examples/serve_curl.sh
set -eu
url=${LOGO_URL:-http://127.0.0.1:8000}

ask() { # path, body
    curl --silent --show-error --fail-with-body --no-buffer "$url$1" \
        --header "Authorization: Bearer ${LOGO_API_KEY:-none}" \
        --header 'Content-Type: application/json' --data "$2"
    echo
}

echo '# selects adapters by itself'
ask /v1/completions '{"model": "logo", "prompt": "What is 7 plus 5?", "temperature": 0}'

echo '# streams, and says how many tokens it was'
ask /v1/chat/completions '{"model": "logo", "messages": [{"role": "user", "content": "What is the opposite of hot?"}],
    "temperature": 0, "stream": true, "stream_options": {"include_usage": true}}'

echo '# which adapters would answer, without answering'
ask /v1/logo/select '{"prompt": "What is 7 plus 5?", "logo": {"k": 2}}'
