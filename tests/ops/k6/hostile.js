// Requests that are well-formed and wrong, from many virtual users at once, by a client that is not ours.
// Environment: ADDRESS (host:port), PROTO (folder of the .proto files), COUNT (requests), RESULT (file to write).
// Every request must end with one of ALLOWED; what it ended with is counted in RESULT.
import grpc from 'k6/net/grpc';
import { Counter } from 'k6/metrics';

const ALLOWED = ['OK', 'INVALID_ARGUMENT', 'NOT_FOUND', 'DEADLINE_EXCEEDED', 'RESOURCE_EXHAUSTED', 'ALREADY_EXISTS'];
const NAMES = Object.fromEntries(Object.entries(grpc).filter(([name]) => name.startsWith('Status'))
  .map(([name, code]) => [code, name.slice(6).replace(/([a-z])([A-Z])/g, '$1_$2').toUpperCase()]));

const client = new grpc.Client();
client.load([__ENV.PROTO], 'redraft/v1/generation.proto', 'redraft/v1/tokenizer.proto');

const allowed = new Counter('allowed');
const forbidden = new Counter('forbidden');

export const options = {
  scenarios: { attack: { executor: 'shared-iterations', vus: 8, iterations: Number(__ENV.COUNT), maxDuration: '30m' } },
  thresholds: { forbidden: ['count==0'], allowed: [`count==${__ENV.COUNT}`] },
};

const generate = '/redraft.v1.GenerationService/Generate';
const small = { text: 'a', stopping: { maxNewTokens: 2 } };
const attacks = [
  () => [generate, { generation: { ...small, sampling: { temperature: 'NaN' } } }],
  () => [generate, { generation: { ...small, sampling: { topP: 'Infinity', minP: -1, topK: 4294967295 } } }],
  () => [generate, { generation: { ...small, sampling: { n: 4294967295, seed: '18446744073709551615' } } }],
  () => [generate, { generation: { ...small, stopping: { maxNewTokens: 4294967295 } } }],
  () => [generate, { generation: { ...small, stopping: { maxNewTokens: 0, minNewTokens: 7 } } }],
  () => [generate, { generation: { ...small, output: { logprobs: 4294967295, truncatePromptTokens: 0 } } }],
  () => [generate, { generation: { ...small, requestId: 'k6' } }],
  () => [generate, { generation: { ...small, text: 'x'.repeat(300000) } }],
  () => [generate, { generation: { ...small, text: 'x'.repeat(2000000) } }],
  () => [generate, { generation: { tokenIds: { ids: [4294967295] } } }],
  () => [generate, { generation: { chat: { messages: Array(1025).fill({ role: 'user', content: 'a' }) } } }],
  () => [generate, { generation: { model: '../'.repeat(1000) } }],
  () => [generate, {}],
  () => [generate, { generation: small }, { timeout: '1ms' }],
  () => ['/redraft.v1.TokenizerService/Tokenize', { input: {} }],
  () => ['/redraft.v1.TokenizerService/Detokenize', { tokenIds: Array(20000).fill(4294967295) }],
];

let connected = false;

export default function () {
  if (!connected) {
    client.connect(__ENV.ADDRESS, { plaintext: true });
    connected = true;
  }
  const [method, request, params] = attacks[Math.floor(Math.random() * attacks.length)]();
  const reply = client.invoke(method, request, params);
  const name = NAMES[reply.status] || 'OK';
  (ALLOWED.includes(name) ? allowed : forbidden).add(1, { code: name });
}

export function handleSummary(data) {
  const count = (metric) => (data.metrics[metric] ? data.metrics[metric].values.count : 0);
  return { [__ENV.RESULT]: JSON.stringify({ allowed: count('allowed'), forbidden: count('forbidden') }) };
}
