//! OpenMetrics: the status in the words of Prometheus, over a small HTTP server on loopback.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, atomic::AtomicU64},
    thread,
    time::{Duration, Instant},
};

use parking_lot::RwLock;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

use crate::engine::{
    attributes::{self, ATTRIBUTES},
    status::{Condition, Status},
};

/// The most that is read of a request.
const REQUEST_LIMIT_BYTES: usize = 8 << 10;
/// How long a scraper may take to ask, and then to take its answer.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VmLabel {
    vm: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConditionLabel {
    vm: String,
    condition: String,
}

type Float = Gauge<f64, AtomicU64>;

/// The status as OpenMetrics text.
///
/// # Errors
/// Never in practice: writing to a string does not fail.
pub fn text(status: &Status) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("aerostat");
    let mut host = |name: &str, help: &str, bytes: i64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(bytes);
        registry.register_with_unit(name, help, Unit::Bytes, gauge);
    };
    host(
        "host_total",
        "Memory of the host",
        signed(status.host.total_bytes),
    );
    host(
        "host_available",
        "Host memory usable without swapping",
        signed(status.host.available_bytes),
    );
    host(
        "host_high",
        "Host memory the policy keeps available",
        signed(status.host.high_bytes),
    );
    host(
        "host_low",
        "Below this it is an emergency",
        signed(status.host.low_bytes),
    );
    host(
        "host_swap_free",
        "Free swap space of the host",
        signed(status.host.swap_free_bytes),
    );
    if status.ledger.enabled {
        host(
            "budget",
            "What all VMs together may occupy",
            signed(status.ledger.budget_bytes),
        );
        host(
            "pool",
            "Of the budget, what is promised to no VM",
            status.ledger.pool_bytes,
        );
    }
    if let Some(pressure) = status.host.pressure {
        let gauge = Float::default();
        gauge.set(pressure.some_avg10);
        registry.register(
            "host_pressure_some_percent",
            "Time in which some task waited for memory, over 10 s",
            gauge,
        );
    }
    let mut counter = |name: &str, help: &str, value: u64| {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    };
    counter("decisions", "Rounds of decisions", status.ticks);
    counter(
        "pressure_events",
        "Pressure triggers that fired",
        status.host.pressure_events,
    );
    vm_metrics(status, &mut registry);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn vm_metrics(status: &Status, registry: &mut Registry) {
    let conditions = Family::<ConditionLabel, Gauge>::default();
    let all = [
        Condition::Absent,
        Condition::Unreachable,
        Condition::Idle,
        Condition::Running,
    ];
    for vm in &status.vms {
        for condition in all {
            let label = ConditionLabel {
                vm: vm.name.to_string(),
                condition: condition.as_str().to_owned(),
            };
            conditions
                .get_or_create(&label)
                .set(i64::from(vm.condition == condition));
        }
    }
    registry.register(
        "vm_condition",
        "1 for the condition the VM is in",
        conditions,
    );
    for attribute in ATTRIBUTES {
        let name = format!("vm_{}", attribute.name.replace('-', "_"));
        let family = Family::<VmLabel, Float>::default();
        let mut any = false;
        for vm in &status.vms {
            let Some(number) = (attribute.value)(vm).and_then(|text| text.parse().ok()) else {
                continue;
            };
            any = true;
            let label = VmLabel {
                vm: vm.name.to_string(),
            };
            family.get_or_create(&label).set(number);
        }
        let numeric = !matches!(
            attribute.unit,
            attributes::Unit::Word | attributes::Unit::Line
        );
        if any && numeric {
            registry.register(name, attribute.purpose, family);
        }
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Serves the status at `address` on a thread of its own; returns the address it got.
///
/// # Errors
/// The address cannot be had.
pub fn serve(address: SocketAddr, status: Arc<RwLock<Arc<Status>>>) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let bound = listener.local_addr()?;
    thread::Builder::new()
        .name("metrics".into())
        .spawn(move || {
            for stream in listener.incoming() {
                match stream {
                    // One scraper at a time, and each has its time-outs.
                    Ok(stream) => {
                        if let Err(error) = answer(stream, &status) {
                            tracing::debug!("a scraper: {error}");
                        }
                    }
                    Err(_) => thread::sleep(Duration::from_millis(100)),
                }
            }
        })?;
    Ok(bound)
}

fn answer(mut stream: TcpStream, status: &RwLock<Arc<Status>>) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    let mut chunk = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        stream.set_read_timeout(Some(until(deadline)?))?;
        let count = stream.read(&mut chunk)?;
        if count == 0 || request.len() > REQUEST_LIMIT_BYTES {
            return Ok(());
        }
        request.extend(chunk.iter().take(count));
    }
    let first = request
        .split(|byte| *byte == b'\r')
        .next()
        .unwrap_or_default();
    let mut words = first.split(|byte| *byte == b' ');
    let method = words.next().unwrap_or_default();
    let path = words.next().unwrap_or_default();
    let (code, kind, body) = match (method, path) {
        (b"GET", b"/metrics") => match text(&status.read().clone()) {
            Ok(text) => (
                "200 OK",
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                text,
            ),
            Err(error) => ("500 Internal Server Error", "text/plain", error.to_string()),
        },
        (b"GET", b"/") => (
            "200 OK",
            "text/plain",
            "aerostatd: see /metrics\n".to_owned(),
        ),
        _ => ("404 Not Found", "text/plain", "see /metrics\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {code}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let answer = head + &body;
    let mut rest = answer.as_bytes();
    let deadline = Instant::now() + PATIENCE;
    while !rest.is_empty() {
        stream.set_write_timeout(Some(until(deadline)?))?;
        let written = stream.write(rest)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    Ok(())
}

/// What is left of the time.
fn until(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::view::tests::example;

    #[test]
    fn metrics_are_served_over_http_with_units_in_their_names() {
        let status = Arc::new(RwLock::new(Arc::new(example())));
        let address = serve("127.0.0.1:0".parse().unwrap(), status).unwrap();
        let get = |path: &str| {
            let mut stream = TcpStream::connect(address).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };

        let text = get("/metrics");

        assert!(
            text.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text"),
            "{text}"
        );
        for line in [
            "aerostat_host_available_bytes 4294967296",
            "aerostat_pool_bytes -5",
            "aerostat_decisions_total 12",
            "aerostat_vm_actual_bytes{vm=\"web\"} 1073741824",
            "aerostat_vm_condition{vm=\"web\",condition=\"running\"} 1",
            "# EOF",
        ] {
            assert!(
                text.lines().any(|found| found.starts_with(line)),
                "{line} is not in\n{text}"
            );
        }
        assert!(get("/other").starts_with("HTTP/1.1 404"));
    }

    #[test]
    fn a_scraper_that_dawdles_holds_up_the_next_one_for_two_seconds_at_most() {
        let status = Arc::new(RwLock::new(Arc::new(example())));
        let address = serve("127.0.0.1:0".parse().unwrap(), status).unwrap();
        let mut slow = TcpStream::connect(address).unwrap();
        let begin = Instant::now();
        // A byte at a time, as often as it takes and no longer than the test.
        thread::spawn(move || {
            while begin.elapsed() < Duration::from_secs(30) && slow.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(200));
            }
        });
        let mut stream = TcpStream::connect(address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        write!(stream, "GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("see /metrics\n"), "{text}");
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}
