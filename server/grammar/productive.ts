import { NOTHING, type Grammar, type GrammarNode } from './grammar.js';

/**
 * The grammar without the parts that can never be completed (an object that must hold itself, a type without
 * values); null where nothing is left. A sequence would follow them without end.
 */
export function productivePart({ rules }: Grammar): Grammar | null {
  const isProductive = new Uint8Array(rules.length); // [num_rules]
  const check = (node: GrammarNode): boolean => {
    switch (node.kind) {
      case 'text':
      case 'control':
        return true;
      case 'class':
        return node.ranges.length > 0;
      case 'sequence':
        return node.items.every(check);
      case 'choice':
        return node.items.some(check);
      case 'repeat':
        if (node.max !== null && node.max < node.min) return false;
        return node.min === 0 || check(node.item);
      case 'rule':
        return isProductive[node.index] === 1;
    }
  };
  const users = new Map<number, Set<number>>();
  for (const [index, rule] of rules.entries()) {
    for (const used of rulesIn(rule)) users.set(used, (users.get(used) ?? new Set()).add(index));
  }
  const open = [...rules.keys()];
  for (let index = open.pop(); index !== undefined; index = open.pop()) {
    if (isProductive[index] === 1 || !check(rules[index]!)) continue;
    isProductive[index] = 1;
    open.push(...(users.get(index) ?? []));
  }
  if (isProductive[0] === 0) return null;
  const prune = (node: GrammarNode): GrammarNode => {
    if (!check(node)) return NOTHING;
    switch (node.kind) {
      case 'sequence':
        return { kind: 'sequence', items: node.items.map(prune) };
      case 'choice':
        return { kind: 'choice', items: node.items.filter(check).map(prune) };
      case 'repeat':
        return check(node.item) ? { ...node, item: prune(node.item) } : { kind: 'sequence', items: [] };
      case 'text':
      case 'class':
      case 'control':
      case 'rule':
        return node;
    }
  };
  return { rules: rules.map(prune) };
}

function rulesIn(node: GrammarNode): number[] {
  switch (node.kind) {
    case 'rule':
      return [node.index];
    case 'sequence':
    case 'choice':
      return node.items.flatMap(rulesIn);
    case 'repeat':
      return rulesIn(node.item);
    case 'text':
    case 'class':
    case 'control':
      return [];
  }
}
