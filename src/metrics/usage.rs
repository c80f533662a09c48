//! What principals have used, for whoever is to bill them.

use std::{collections::BTreeMap, mem, sync::Mutex, time::Duration};

use super::lock;

/// Principals that are counted separately; what those use that come later counts for
/// callers without a name.
const MAX_PRINCIPALS: usize = 10_000;

/// Callers without a name.
const NOBODY: &str = "-";

/// What connections have used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Whole messages read.
    pub requests: u64,
    /// Bytes read.
    pub bytes_in: u64,
    /// Bytes written.
    pub bytes_out: u64,
    /// Host functions that calls have called.
    pub host_calls: u64,
    /// Most bytes of linear memory that a call held.
    pub peak_memory: u64,
}

impl Usage {
    /// What has come since an earlier one.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            requests: self.requests - before.requests,
            bytes_in: self.bytes_in - before.bytes_in,
            bytes_out: self.bytes_out - before.bytes_out,
            host_calls: self.host_calls - before.host_calls,
            peak_memory: self.peak_memory,
        }
    }

    fn add(&mut self, more: Self) {
        self.requests += more.requests;
        self.bytes_in += more.bytes_in;
        self.bytes_out += more.bytes_out;
        self.host_calls += more.host_calls;
        self.peak_memory = self.peak_memory.max(more.peak_memory);
    }
}

/// What a principal has used since it was reported last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    /// Who.
    pub principal: String,
    /// By its connections.
    pub usage: Usage,
    /// Processor time of its calls.
    pub cpu: Duration,
}

#[derive(Debug, Default)]
struct Account {
    total: Usage,
    due: Usage,
    /// Processor time that was reported.
    cpu: Duration,
}

/// Usage by principal. Connections add theirs when they end, and whenever
/// somebody looks: requests write to nothing that connections share.
#[derive(Debug, Default)]
pub struct Usages(Mutex<BTreeMap<String, Account>>);

impl Usages {
    /// Adds to what a principal has used; to that of nobody if it has no name.
    pub fn add(&self, principal: Option<&str>, usage: Usage) {
        if usage == Usage::default() {
            return;
        }
        let mut accounts = lock(&self.0);
        let known = |name: &&str| accounts.len() < MAX_PRINCIPALS || accounts.contains_key(*name);
        let name = principal.filter(known).unwrap_or(NOBODY);
        if !accounts.contains_key(name) {
            accounts.insert(name.into(), Account::default());
        }
        if let Some(account) = accounts.get_mut(name) {
            account.total.add(usage);
            account.due.add(usage);
        }
    }

    /// All so far by principal, in the order of their names; `-` for callers
    /// without one.
    #[must_use]
    pub fn all(&self) -> Vec<(String, Usage)> {
        let accounts = lock(&self.0);
        let all = accounts.iter();
        all.map(|(name, account)| (name.clone(), account.total))
            .collect()
    }

    /// What principals with a name have used since this was asked last. `cpu`
    /// is their processor time so far.
    #[must_use]
    pub fn due(&self, cpu: &[(String, Duration)]) -> Vec<Due> {
        let cpu: BTreeMap<_, _> = cpu.iter().map(|(name, time)| (&**name, *time)).collect();
        let mut accounts = lock(&self.0);
        let named = accounts.iter_mut().filter(|(name, _)| *name != NOBODY);
        let due = named.filter_map(|(name, account)| {
            let so_far = cpu.get(&**name).copied().unwrap_or_default();
            let due = Due {
                principal: name.clone(),
                usage: mem::take(&mut account.due),
                cpu: so_far.saturating_sub(account.cpu),
            };
            account.cpu = so_far;
            (due.usage != Usage::default() || !due.cpu.is_zero()).then_some(due)
        });
        due.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_is_reported_once() {
        let usages = Usages::default();
        let used = |requests, peak_memory| Usage {
            requests,
            peak_memory,
            ..Usage::default()
        };
        usages.add(Some("ann"), used(2, 7));
        usages.add(None, used(1, 1));
        usages.add(Some("ann"), used(1, 5));
        let cpu = |millis| [("ann".to_owned(), Duration::from_millis(millis))];
        let due = |millis, usage| Due {
            principal: "ann".into(),
            usage,
            cpu: Duration::from_millis(millis),
        };
        assert_eq!(usages.due(&cpu(10)), [due(10, used(3, 7))]);
        assert_eq!(usages.due(&cpu(10)), []);
        assert_eq!(usages.due(&cpu(15)), [due(5, Usage::default())]);
        usages.add(Some("ann"), used(1, 5));
        assert_eq!(usages.due(&cpu(15)), [due(0, used(1, 5))]);
        let all = [("-".into(), used(1, 1)), ("ann".into(), used(4, 7))];
        assert_eq!(usages.all(), all);
    }

    #[test]
    fn those_beyond_the_bound_are_nobody() {
        let usages = Usages::default();
        let used = Usage {
            requests: 1,
            ..Usage::default()
        };
        (0..MAX_PRINCIPALS + 10).for_each(|name| usages.add(Some(&name.to_string()), used));
        let all = usages.all();
        assert_eq!(
            (all.len(), &*all[0].0, all[0].1.requests),
            (MAX_PRINCIPALS + 1, "-", 10)
        );
    }
}
