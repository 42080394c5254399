//! What the configuration accepts, and how it says what it does not.

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("aerostatd.toml"))
}

/// The error for a text, as an operator sees it.
fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

const WHOLE: &str = r#"
[host]
period-ms = 500
cgroup-root = "/sys/fs/cgroup/vms.slice"
limits = "high-and-max"
budget = "48G"
metrics = "off"

[policy]
high-percent = 12

[[vm]]
name = "web"
protocol = "qmp"
socket = "/run/qemu/web.qmp"
floor = "512M"
weight = 200
mode = "manual"
target = "1GiB"
traits = { page-sharing = true }

[[vm]]
protocol = "firecracker"
socket = "/run/fc/{name}.sock"
cgroup = "fc/{name}"
"#;

#[test]
fn a_whole_configuration_is_read() {
    let config = parse(WHOLE).unwrap();

    assert_eq!(config.period(), Duration::from_millis(500));
    assert_eq!(config.timeout(), Duration::from_millis(1000));
    assert_eq!(config.limits(), Limits::HighAndMax);
    assert_eq!(config.host.budget, Some(Size(48 << 30)));
    assert_eq!(config.metrics_address(), None);
    assert_eq!(config.policy.high_percent, 12.0);
    let [web, pattern] = &config.vms[..] else {
        panic!("two VMs")
    };
    assert_eq!(
        (web.name(), web.mode, web.floor),
        (Some("web"), Mode::Manual, Size(512 << 20))
    );
    assert!(web.traits.page_sharing);
    assert_eq!((pattern.name(), pattern.mode), (None, Mode::Auto));
}

#[test]
fn nothing_at_all_is_a_configuration_without_limits() {
    let config = parse("").unwrap();
    assert_eq!(config.limits(), Limits::None);
    assert_eq!(
        config.metrics_address(),
        Some("127.0.0.1:9750".parse().unwrap())
    );
    assert_eq!(config.control_mode(), 0o660);
}

#[test]
fn errors_name_line_column_and_key() {
    let cases = [
        (
            "[host]\nperiod-ms = 5\n",
            "aerostatd.toml:2:13: host.period-ms: 5 is not between",
        ),
        (
            "[host]\n\nperiod = 5\n",
            "aerostatd.toml:3:1: host.period: unknown field",
        ),
        (
            "[host]\nreserve = \"1X\"\n",
            "aerostatd.toml:2:11: host.reserve: not a size",
        ),
        (
            "[host]\nmetrics = \"here\"\n",
            "aerostatd.toml:2:11: host.metrics: write an address",
        ),
        (
            "[host]\ncontrol-mode = \"0777\"\n",
            "aerostatd.toml:2:16: host.control-mode: write octal",
        ),
        (
            "[policy]\n# high\nidle-tax-percent = 300\n",
            "aerostatd.toml:3:1: policy.idle-tax-percent: 300",
        ),
        (
            "[[vm]]\nname = \"a\"\nprotocol = \"qmp2\"\nsocket = \"/a\"\n",
            "aerostatd.toml:3:12: vm.protocol: unknown variant",
        ),
        (
            "[[vm]]\nname = \"a\"\nprotocol = \"qmp\"\nsocket = \"a\"\n",
            "aerostatd.toml:4:10: vm.socket: write an absolute",
        ),
        (
            "[[vm]]\nprotocol = \"qmp\"\nsocket = \"/a\"\n",
            "aerostatd.toml:3:10: vm.socket: give the VM a name",
        ),
        (
            "[[vm]]\nname = \"a\"\nprotocol = \"qmp\"\nsocket = \"/{name}\"\n",
            "aerostatd.toml:2:8: vm.name: leave it out",
        ),
        (
            "[[vm]]\nprotocol = \"qmp\"\nsocket = \"/{name}/s\"\n",
            "aerostatd.toml:3:10: vm.socket: {name} may stand once",
        ),
        (
            "[[vm]]\nname = \"a/b\"\nprotocol = \"qmp\"\nsocket = \"/a\"\n",
            "aerostatd.toml:2:8: vm.name: letters",
        ),
        (
            "[[vm]]\nname = \"a\"\nprotocol = \"qmp\"\nsocket = \"/a\"\nweight = 0\n",
            "aerostatd.toml:5:10: vm.weight: between",
        ),
        ("[host\n", "aerostatd.toml:1:6: host: "),
    ];
    for (text, expected) in cases {
        let shown = error(text);
        assert!(shown.starts_with(expected), "{shown}\nexpected {expected}");
    }
}

#[test]
fn a_name_is_used_once() {
    let vm = "[[vm]]\nname = \"a\"\nprotocol = \"qmp\"\nsocket = \"/a\"\n";
    let shown = error(&format!("{vm}{vm}"));
    assert!(
        shown.starts_with("aerostatd.toml:6:8: vm.name: \"a\" is used twice"),
        "{shown}"
    );
}

#[test]
fn a_missing_file_is_named() {
    let shown = Config::read(Path::new("/no/such.toml"))
        .unwrap_err()
        .to_string();
    assert!(shown.starts_with("/no/such.toml: "), "{shown}");
}

/// What can be set is on the page that is said to have all of it.
#[test]
fn every_key_of_the_policy_is_on_the_operators_page() {
    let page = include_str!("../../../docs/operations.md");
    let defaults = serde_json::to_value(PolicyConfig::default()).unwrap();
    let keys = defaults.as_object().unwrap().keys();
    let missing: Vec<_> = keys
        .filter(|key| !page.contains(&format!("`{key}`")))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}
