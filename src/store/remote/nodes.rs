//! Which process of an engine has a service's values: the only one, the primary
//! that Sentinels name, or the one of a cluster to which the others point.
//!
//! A command is sent again only where the engine has said that it did not do
//! it, or where it was not sent. The cluster client of the crate `redis` sends
//! again what was cut off on the way, 16 times, so it is not used.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use redis::{Cmd, Value, cmd};

use super::{
    connection::{Connection, Fault, Login, Role, SMALL, half_until, refusal},
    pool::{Lease, Pool},
};
use crate::{
    config::store::{Node, Remote},
    locks::lock,
    store::StoreError,
};

/// How often one command is pointed to another node.
const MAX_REDIRECTS: usize = 5;
/// Nodes whose connections are kept.
const MAX_NODES: usize = 1024;
/// Pause before a command is sent again whose slot is on its way.
const PAUSE: Duration = Duration::from_millis(20);
/// Longest command that is sent together with others, in bytes. They would wait
/// for a longer one.
const SHORT: usize = 4096;
/// Longest answer of a Sentinel, in bytes.
const MAX_SENTINEL: usize = 4096;

/// What a process that is of no cluster says when it is asked for its slots.
const NO_CLUSTER: &str = "cluster support disabled";
/// Longest answer about the slots of a cluster, in bytes.
const MAX_SLOTS: usize = 8 * 1024 * 1024;

/// A command in the engine's encoding, and what an answer may have.
pub(super) struct Question<'a> {
    pub(super) command: &'a [u8],
    /// Sent where the engine does not know the script.
    pub(super) whole: &'a dyn Fn() -> Vec<u8>,
    /// Bytes of the answer.
    pub(super) limit: usize,
    pub(super) deadline: Instant,
}

pub(super) struct Nodes {
    remote: Remote,
    login: Arc<Login>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pools: HashMap<Node, Arc<Pool>>,
    /// Where the last answer came from, by service.
    homes: HashMap<Arc<str>, Arc<Pool>>,
    /// Which of the nodes in the settings is asked first: one that was reached.
    first: usize,
}

impl Nodes {
    pub(super) fn new(remote: Remote, login: Login) -> Self {
        Self {
            remote,
            login: Arc::new(login),
            state: Mutex::default(),
        }
    }

    /// Asks the node that has the service's values.
    pub(super) fn ask(&self, service: &str, question: &Question<'_>) -> Result<Value, StoreError> {
        let mut tried = Vec::new();
        let mut redirects = 0;
        let home = lock(&self.state).homes.get(service).cloned();
        let mut is_home = home.is_some();
        let mut pool = match home {
            Some(home) => home,
            None => self.pool(&self.first(question.deadline)?),
        };
        let mut asking = false;
        loop {
            let answer = ask_one(&pool, asking, question);
            let asked = std::mem::take(&mut asking);
            match answer {
                Ok(Value::ServerError(error)) => match error.code() {
                    "MOVED" | "ASK" if redirects < MAX_REDIRECTS => {
                        redirects += 1;
                        asking = error.code() == "ASK";
                        let node = pointed_to(error.details(), pool.node())
                            .ok_or_else(|| StoreError::Refused(refusal(&error)))?;
                        (pool, is_home) = (self.pool(&node), false);
                    }
                    "TRYAGAIN" if question.deadline > Instant::now() + PAUSE => {
                        thread::sleep(PAUSE);
                        asking = asked;
                    }
                    // It is no primary any more, or not yet; another may be.
                    "READONLY" | "MASTERDOWN" | "CLUSTERDOWN" | "LOADING" | "MOVED" | "ASK" => {
                        return Err(self.gone(&pool, &error));
                    }
                    // What Redis 6 makes of it in a script.
                    "ERR"
                        if error
                            .details()
                            .is_some_and(|text| text.contains("-READONLY ")) =>
                    {
                        return Err(self.gone(&pool, &error));
                    }
                    _ => return Err(StoreError::Refused(refusal(&error))),
                },
                Ok(value) => {
                    if !is_home {
                        self.settle(service, pool);
                    }
                    return Ok(value);
                }
                // The call was late, not the node.
                Err(fault) if !fault.was_sent && Instant::now() >= question.deadline => {
                    return Err(fault.into());
                }
                Err(fault) => {
                    lock(&self.state).homes.remove(service);
                    if fault.was_sent {
                        return Err(fault.into());
                    }
                    self.pass_over(pool.node());
                    tried.push(pool.node().clone());
                    match self.next(&tried, question.deadline) {
                        Some(next) => (pool, is_home) = (self.pool(&next), false),
                        None => return Err(fault.into()),
                    }
                }
            }
        }
    }

    /// Asks one node, whatever it has.
    pub(super) fn ask_at(
        &self,
        node: &Node,
        command: &Cmd,
        limit: usize,
        deadline: Instant,
    ) -> Result<Value, StoreError> {
        let command = command.get_packed_command();
        let lease = self.pool(node).take(deadline);
        let asked = lease.and_then(|mut lease| {
            lease.using(|connection| connection.ask(&command, limit, deadline))
        });
        match asked {
            Ok(Value::ServerError(error)) => Err(StoreError::Refused(refusal(&error))),
            Ok(value) => Ok(value),
            Err(fault) => Err(fault.into()),
        }
    }

    /// The node that has answered for a service last.
    pub(super) fn home(&self, service: &str) -> Option<Node> {
        let state = lock(&self.state);
        Some(state.homes.get(service)?.node().clone())
    }

    /// All nodes that have values.
    pub(super) fn all(&self, deadline: Instant) -> Result<Vec<Node>, StoreError> {
        if let Some(name) = &self.remote.primary {
            return Ok(vec![self.primary(name, deadline)?]);
        }
        let mut last = StoreError::Away("no node".into());
        for asked in &self.listed() {
            match self.ask_at(asked, cmd("CLUSTER").arg("SLOTS"), MAX_SLOTS, deadline) {
                Ok(slots) => return Ok(primaries(&slots, asked)),
                // It is the only one.
                Err(StoreError::Refused(why))
                    if self.remote.nodes.len() == 1 && why.contains(NO_CLUSTER) =>
                {
                    return Ok(vec![asked.clone()]);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Where a command of a service goes that has no home.
    fn first(&self, deadline: Instant) -> Result<Node, StoreError> {
        match &self.remote.primary {
            Some(name) => self.primary(name, deadline),
            None => Ok(self.listed()[0].clone()),
        }
    }

    /// The nodes of the settings, the one first that was reached last.
    fn listed(&self) -> Vec<Node> {
        let first = lock(&self.state).first;
        let mut nodes = self.remote.nodes.clone();
        nodes.rotate_left(first);
        nodes
    }

    /// This node of the settings was not reached, so another is asked first.
    fn pass_over(&self, node: &Node) {
        let nodes = &self.remote.nodes;
        let mut state = lock(&self.state);
        if nodes.get(state.first) == Some(node) {
            state.first = (state.first + 1) % nodes.len();
        }
    }

    /// Where it goes if nobody was reached so far: any node of a cluster points
    /// to the right one.
    fn next(&self, tried: &[Node], deadline: Instant) -> Option<Node> {
        if let Some(name) = &self.remote.primary {
            let now = self.primary(name, deadline).ok()?;
            return (!tried.contains(&now)).then_some(now);
        }
        let mut listed = self.listed().into_iter();
        listed.find(|node| !tried.contains(node))
    }

    /// Asks the Sentinels for the primary.
    fn primary(&self, name: &str, deadline: Instant) -> Result<Node, StoreError> {
        let question = cmd("SENTINEL")
            .arg("GET-MASTER-ADDR-BY-NAME")
            .arg(name)
            .get_packed_command();
        let mut last = String::new();
        for sentinel in &self.listed() {
            let deadline = half_until(deadline);
            let said = Connection::open(sentinel, &self.login, Role::Sentinel, deadline).and_then(
                |mut connection| match connection.ask(&question, MAX_SENTINEL, deadline) {
                    Ok(Value::Array(parts)) => match &parts[..] {
                        [Value::BulkString(host), Value::BulkString(port)] => {
                            node(host, port).ok_or_else(|| "its answer is no address".into())
                        }
                        _ => Err("its answer is no address".into()),
                    },
                    Ok(Value::ServerError(error)) => Err(refusal(&error)),
                    Ok(_) => Err(format!("knows no primary {name:?}")),
                    Err(fault) => Err(fault.why),
                },
            );
            match said {
                Ok(node) => return Ok(node),
                Err(why) => {
                    self.pass_over(sentinel);
                    last = format!("Sentinel {sentinel}: {why}");
                }
            }
        }
        Err(StoreError::Away(last))
    }

    fn role(&self) -> Role {
        if self.remote.primary.is_some() {
            Role::Primary
        } else if self.remote.nodes.len() > 1 {
            Role::Member
        } else {
            Role::Any
        }
    }

    fn pool(&self, node: &Node) -> Arc<Pool> {
        let mut state = lock(&self.state);
        if state.pools.len() >= MAX_NODES {
            (state.pools, state.homes) = Default::default();
        }
        let pool = state.pools.entry(node.clone()).or_insert_with(|| {
            Arc::new(Pool::new(
                node.clone(),
                self.role(),
                Arc::clone(&self.login),
            ))
        });
        Arc::clone(pool)
    }

    /// This node has the service's values, unless it has gone meanwhile.
    fn settle(&self, service: &str, pool: Arc<Pool>) {
        let mut state = lock(&self.state);
        let known = state.pools.get(pool.node());
        if known.is_some_and(|known| Arc::ptr_eq(known, &pool)) {
            state.homes.insert(service.into(), pool);
        }
    }

    /// No service's values are there any more: another node may have them, or
    /// the same one by new connections.
    fn gone(&self, pool: &Arc<Pool>, error: &redis::ServerError) -> StoreError {
        let mut state = lock(&self.state);
        state.homes.retain(|_, home| !Arc::ptr_eq(home, pool));
        state.pools.retain(|_, known| !Arc::ptr_eq(known, pool));
        StoreError::Away(format!("{}: {}", pool.node(), refusal(error)))
    }
}

/// Asks one node, together with other callers where the question is short.
fn ask_one(pool: &Arc<Pool>, asking: bool, question: &Question<'_>) -> Result<Value, Fault> {
    let Question {
        command,
        whole,
        limit,
        deadline,
    } = *question;
    let is_unknown =
        |answer: &Value| matches!(answer, Value::ServerError(error) if error.code() == "NOSCRIPT");
    if command.len() <= SHORT && limit <= SMALL && !asking {
        let answer = pool.ask_pipelined(command, deadline)?;
        if !is_unknown(&answer) {
            return Ok(answer);
        }
    }
    let mut lease = pool.take(deadline)?;
    if asking {
        ask_for_it(&mut lease, deadline)?;
    }
    let answer = lease.using(|connection| connection.ask(command, limit, deadline))?;
    if !is_unknown(&answer) {
        return Ok(answer);
    }
    if asking {
        ask_for_it(&mut lease, deadline)?;
    }
    lease.using(|connection| connection.ask(&whole(), limit, deadline))
}

/// Of a slot that is on its way, the next command may be asked for here.
fn ask_for_it(lease: &mut Lease, deadline: Instant) -> Result<(), Fault> {
    let asking = cmd("ASKING").get_packed_command();
    let asked = lease.using(|connection| connection.ask(&asking, MAX_SENTINEL, deadline));
    asked.map(drop).map_err(|fault| Fault::unsent(fault.why))
}

/// The node in `SLOT HOST:PORT`; without a host, it is the one that says so.
fn pointed_to(details: Option<&str>, said_by: &Node) -> Option<Node> {
    let (host, port) = details?.split(' ').nth(1)?.rsplit_once(':')?;
    let mut found = node(host.as_bytes(), port.as_bytes())?;
    if found.host.is_empty() || found.host == "?" {
        found.host.clone_from(&said_by.host);
    }
    Some(found)
}

/// The primaries of an answer to `CLUSTER SLOTS`: of each range of slots, the
/// first node.
fn primaries(slots: &Value, asked: &Node) -> Vec<Node> {
    let array = |value: &Value| match value {
        Value::Array(parts) => parts.clone(),
        _ => Vec::new(),
    };
    let mut found = Vec::new();
    for range in array(slots) {
        let first = array(&range).get(2).map(array).unwrap_or_default();
        let host = match first.first() {
            Some(Value::BulkString(host)) if !host.is_empty() => {
                String::from_utf8_lossy(host).into_owned()
            }
            _ => asked.host.clone(),
        };
        if let Some(Value::Int(port)) = first.get(1)
            && let Ok(port) = u16::try_from(*port)
        {
            found.push(Node { host, port });
        }
    }
    found.sort();
    found.dedup();
    found
}

fn node(host: &[u8], port: &[u8]) -> Option<Node> {
    let text = |bytes| std::str::from_utf8(bytes).ok();
    let host = text(host)?.trim_matches(['[', ']']).to_owned();
    let port = text(port)?.parse().ok()?;
    Some(Node { host, port })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
    };

    #[test]
    fn a_redirect_names_a_node() {
        let asked = Node {
            host: "here".into(),
            port: 1,
        };
        let check = |details: &str, expected: Option<(&str, u16)>| {
            let found = pointed_to(Some(details), &asked);
            let expected = expected.map(|(host, port)| Node {
                host: host.into(),
                port,
            });
            assert_eq!(found, expected, "{details}");
        };
        check("3999 127.0.0.1:6381", Some(("127.0.0.1", 6381)));
        check("3999 ::1:6381", Some(("::1", 6381)));
        check("3999 :6381", Some(("here", 6381)));
        check("3999 ?:6381", Some(("here", 6381)));
        check("3999", None);
        check("3999 a:b", None);
    }

    /// Stands in for a node: of each connection, answers what it is asked with
    /// these lines in turn, then ends it. Says what it was asked.
    fn stand_in(answers: impl Fn(usize) -> Vec<String> + Send + 'static) -> (Node, Asked) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let node = Node {
            host: "127.0.0.1".into(),
            port: listener.local_addr().unwrap().port(),
        };
        let asked = Asked::default();
        let noted = Arc::clone(&asked);
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                for answer in answers(number) {
                    let mut command = [0; 256];
                    let count = stream.read(&mut command).unwrap();
                    let text = String::from_utf8_lossy(&command[..count]).into_owned();
                    noted.lock().unwrap().push(text);
                    stream.write_all(answer.as_bytes()).unwrap();
                }
            }
        });
        (node, asked)
    }

    type Asked = Arc<Mutex<Vec<String>>>;

    fn nodes(nodes: Vec<Node>, primary: Option<&str>) -> Nodes {
        let remote = Remote {
            nodes,
            primary: primary.map(str::to_owned),
            tls: false,
            user: None,
            db: 0,
            password_file: None,
            ca: None,
        };
        Nodes::new(remote, Login::default())
    }

    fn ask(nodes: &Nodes, service: &str, time: Duration) -> Result<Value, StoreError> {
        let question = Question {
            command: b"?",
            whole: &Vec::new,
            limit: SMALL,
            deadline: Instant::now() + time,
        };
        nodes.ask(service, &question)
    }

    const LATER: Duration = Duration::from_secs(30);

    /// Another service that only reads would not notice.
    #[test]
    fn a_node_that_is_no_primary_loses_all_services() {
        let (node, _) = stand_in(|connection| {
            let answers = [":1\r\n", ":1\r\n", "-READONLY it is a replica\r\n"];
            let count = if connection == 0 { 3 } else { 1 };
            answers[..count].iter().map(|&line| line.into()).collect()
        });
        let nodes = nodes(vec![node], None);
        let homes = || (nodes.home("a").is_some(), nodes.home("b").is_some());
        let ask = |service| ask(&nodes, service, LATER);
        assert_eq!((ask("a"), ask("b")), (Ok(Value::Int(1)), Ok(Value::Int(1))));
        assert_eq!(homes(), (true, true));
        assert!(matches!(ask("a"), Err(StoreError::Away(_))));
        assert_eq!(homes(), (false, false));
        assert_eq!(ask("b"), Ok(Value::Int(1)), "by a connection of its own");
    }

    /// Where a slot is on its way, a command may have to be tried again, each time
    /// behind an ASKING.
    #[test]
    fn a_slot_on_its_way_is_asked_for_again() {
        let (new, asked) = stand_in(|_| {
            let answers = ["+OK\r\n", "-TRYAGAIN soon\r\n", "+OK\r\n", ":7\r\n"];
            answers.map(str::to_owned).to_vec()
        });
        let (old, _) = stand_in(move |_| vec![format!("-ASK 1 127.0.0.1:{}\r\n", new.port)]);
        let nodes = nodes(vec![old], None);
        assert_eq!(ask(&nodes, "a", LATER), Ok(Value::Int(7)));
        let asking = "*1\r\n$6\r\nASKING\r\n";
        assert_eq!(*asked.lock().unwrap(), [asking, "?", asking, "?"]);
    }

    #[test]
    fn a_sentinel_that_is_silent_leaves_time_for_the_next() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = Node {
            host: "127.0.0.1".into(),
            port: silent.local_addr().unwrap().port(),
        };
        let (primary, _) = stand_in(|_| {
            let role = "*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n";
            vec![role.into(), ":1\r\n".into()]
        });
        let (answers, asked) = stand_in(move |_| {
            let port = primary.port.to_string();
            vec![format!(
                "*2\r\n$9\r\n127.0.0.1\r\n${}\r\n{port}\r\n",
                port.len()
            )]
        });
        let nodes = nodes(vec![silent, answers], Some("mine"));
        let time = Duration::from_millis(1500);
        assert_eq!(ask(&nodes, "a", time), Ok(Value::Int(1)));
        assert_eq!(asked.lock().unwrap().len(), 1);
    }
}
